"""python -m bench startup|stream|report|reliability|cpu: run measurements on an otherwise idle machine; results go to bench/results/."""
import sys

from bench import reliability, report, startup, stream

SUITES = {'startup': [startup.main], 'stream': [stream.main], 'report': [report.main], 'reliability': [reliability.main], 'cpu': [startup.main]}

if __name__ == '__main__':
    if len(sys.argv) != 2 or sys.argv[1] not in SUITES: sys.exit(f'usage: python -m bench {"|".join(SUITES)}')
    for suite in SUITES[sys.argv[1]]: print('wrote', suite())
