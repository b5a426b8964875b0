"""python -m bench startup|demo|encode|audit|report|read|stream|size|cpu|gpu|generate|reliability|stopping|ranks|tutorials: run measurements on an otherwise idle machine; results go to bench/results/."""
import importlib
import sys

SUITES = ('startup', 'demo', 'encode', 'audit', 'report', 'read', 'stream', 'size', 'cpu', 'gpu', 'generate', 'reliability', 'stopping', 'ranks', 'tutorials')

if __name__ == '__main__':
    name, more = sys.argv[1] if len(sys.argv) > 1 else '', sys.argv[2:]
    if name not in SUITES or more and name not in ('gpu', 'startup', 'cpu', 'stopping', 'ranks'): sys.exit(f'usage: python -m bench {"|".join(SUITES)}')
    module = importlib.import_module(f'bench.{name}')
    print('wrote', module.main(more) if name in ('gpu', 'stopping') else module.main(*more))
