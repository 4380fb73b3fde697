import argparse
import sys

from bench import compile as gate

parser = argparse.ArgumentParser(prog="python -m bench")
commands = parser.add_subparsers(dest="command", required=True)
compiling = commands.add_parser("compile", help=gate.__doc__.splitlines()[0])
compiling.add_argument("--capability", type=int, nargs="*", default=gate.CAPABILITIES, help="80 is 8.0, and so on")
compiling.add_argument("--sass", action="store_true", help="the instruction account of attention's loops instead")
options = parser.parse_args()
if options.sass:
    print(*gate.accounts(), sep="\n")
    sys.exit(0)
sys.exit(gate.main(options.capability))
