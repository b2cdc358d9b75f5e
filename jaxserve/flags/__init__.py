# SPDX-License-Identifier: Apache-2.0
"""Flags from the fields of dataclasses: declaration, values, parsing, help, configuration files. Knows no command.

setting.py       Setting, beside a field; Flag, a field with its Setting
values.py        from text or YAML to a value; the checks of a value
parser.py        the command line, with argparse
help.py          what --help prints             reference.py   the same as tables in Markdown
config_file.py   --config FILE                  command.py     runs a dataclass as a command
sizes.py         sizes in bytes as text
"""
