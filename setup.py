"""Builds the package from settings.ini, the one place where its name, version, requirements and extras are written."""
import shlex
from configparser import ConfigParser
from pathlib import Path

from setuptools import find_packages, setup

root = Path(__file__).parent
parser = ConfigParser(delimiters=['='])
parser.read(root/'settings.ini', encoding='utf-8')
cfg = parser['DEFAULT']


def words(key):
    "The words of one settings.ini entry; an absent or empty entry has none."
    return shlex.split(cfg.get(key, ''))


pythons = [f'3.{minor}' for minor in range(11, 14)]
statuses = ['1 - Planning', '2 - Pre-Alpha', '3 - Alpha', '4 - Beta', '5 - Production/Stable']
suffix = '_requirements'
extras = {key.removesuffix(suffix): words(key) for key in cfg if key.endswith(suffix)}

setup(
    name=cfg['lib_name'], version=cfg['version'], description=cfg['description'], keywords=cfg['keywords'],
    author=cfg['author'], author_email=cfg['author_email'], url=cfg['git_url'],
    license={'apache2': 'Apache-2.0'}.get(cfg['license'], cfg['license']),
    classifiers=[f"Development Status :: {statuses[int(cfg['status']) - 1]}", 'Intended Audience :: Developers',
                 'Natural Language :: English',
                 *(f'Programming Language :: Python :: {p}' for p in pythons[pythons.index(cfg['min_python']):])],
    packages=find_packages(include=[cfg['lib_path'], cfg['lib_path'] + '.*']),
    package_data={cfg['lib_path']: words('package_data')}, include_package_data=False,
    install_requires=words('requirements'), extras_require=extras,
    python_requires=f">={cfg['min_python']}", zip_safe=False,
    long_description=(root/'README.md').read_text(encoding='utf-8'), long_description_content_type='text/markdown',
    entry_points={'console_scripts': words('console_scripts'), 'nbdev': [f"{cfg['lib_path']}={cfg['lib_path']}._modidx:d"]})
