"""`python -m jaxcomm.data fetch NAME`: puts a named data set into the cache."""

import argparse
import sys
from collections.abc import Sequence

from jaxcomm.data._fetch import SETS, fetch, read_source


def main(argv: Sequence[str] | None = None) -> int:
  """Runs the command line; returns the exit code."""
  parser = argparse.ArgumentParser(prog="python -m jaxcomm.data", description=__doc__)
  command = parser.add_subparsers(dest="command", required=True).add_parser(
    "fetch", help="download, verify and cache a named data set"
  )
  command.add_argument("name", choices=sorted(SETS), metavar="NAME", help=", ".join(sorted(SETS)))
  command.add_argument("--cache-dir", help="default: $JAXCOMM_CACHE, else ~/.cache/jaxcomm")
  command.add_argument("--offline", action="store_true", help="only look into the cache")
  command.add_argument("--archives", metavar="DIR", help="folder of packages downloaded by hand")
  command.add_argument("--any-version", action="store_true", help="accept what the index serves")
  flags = parser.parse_args(argv)
  try:
    folder = fetch(
      flags.name,
      cache_dir=flags.cache_dir,
      offline=flags.offline,
      archives=flags.archives,
      any_version=flags.any_version,
    )
  except (OSError, ValueError) as e:
    print(f"error: {' '.join(str(e).split())}", file=sys.stderr)
    return 1
  source = read_source(folder)
  print(f"{folder}\nlicence: {source['licence']}")
  for package in source["packages"]:
    print(f"{package['file']} sha256 {package['sha256']}")
  return 0


if __name__ == "__main__":
  sys.exit(main())
