"""python -m bench startup|encode|report|stream|cpu|generate|reliability: run measurements on an otherwise idle machine; results go to bench/results/."""
import importlib
import sys

SUITES = ('startup', 'encode', 'report', 'stream', 'cpu', 'generate', 'reliability')

if __name__ == '__main__':
    if len(sys.argv) != 2 or sys.argv[1] not in SUITES: sys.exit(f'usage: python -m bench {"|".join(SUITES)}')
    print('wrote', importlib.import_module(f'bench.{sys.argv[1]}').main())
