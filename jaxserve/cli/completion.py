# SPDX-License-Identifier: Apache-2.0
"""`jaxserve completion`: prints a script that completes commands, flags and choices in a shell.

bash   eval "$(jaxserve completion bash)"
zsh    eval "$(jaxserve completion zsh)"
fish   jaxserve completion fish | source
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Annotated, Literal

from jaxserve.flags.setting import Flag, Setting


@dataclass(frozen=True)
class Completion:
    """Print a shell completion script."""

    shell: Annotated[
        Literal["bash", "zsh", "fish"],
        Setting("Shell to complete in: bash, zsh or fish.", given_as="word", unknown_choice="no completion for {}"),
    ]

    def run(self) -> None:
        from jaxserve import cli

        flags = {name: list(cli.parser_of(name).flags) for name in cli.COMMANDS}
        flags |= {alias: flags[name] for alias, name in cli.ALIASES.items()}
        abouts = {name: command.about for name, command in cli.COMMANDS.items()}
        abouts |= {alias: abouts[name] for alias, name in cli.ALIASES.items()}
        print(_fish(flags, abouts) if self.shell == "fish" else _bash(flags, zsh=self.shell == "zsh"))


def _options(flags: list[Flag]) -> list[str]:
    named = [flag for flag in flags if flag.is_option]
    found = [option for flag in named for option in flag.options]
    return [*found, *(flag.negative for flag in named if flag.negative and flag.default is not False), "--help"]


def _bash(flags: Mapping[str, list[Flag]], *, zsh: bool) -> str:
    """One function for both: zsh can run bash completions."""
    first = " ".join(dict.fromkeys(name.split()[0] for name in flags))
    benches = " ".join(name.split()[1] for name in flags if " " in name)
    lines = ["autoload -U +X compinit && compinit", "autoload -U +X bashcompinit && bashcompinit"] if zsh else []
    lines += [
        "_jaxserve() {",
        '  local word="${COMP_WORDS[COMP_CWORD]}" before="${COMP_WORDS[COMP_CWORD-1]}"',
        '  local command="${COMP_WORDS[1]}" words',
        '  [ "$command" = bench ] && [ "$COMP_CWORD" -gt 2 ] && command="bench ${COMP_WORDS[2]}"',
        f'  if [ "$COMP_CWORD" -eq 1 ]; then words="{first} --help"',
        f'  elif [ "$COMP_CWORD" -eq 2 ] && [ "$command" = bench ]; then words="{benches} --help"',
        '  else case "$command $before" in',
    ]
    for name, own in flags.items():
        for flag in own:
            if flag.choices and flag.is_option:
                patterns = "|".join(f"'{name} {option}'" for option in flag.options)
                lines.append(f'    {patterns}) words="{" ".join(flag.choices)}";;')
    lines += ['    *) case "$command" in']
    for name, own in flags.items():
        places = [choice for flag in own if not flag.is_option for choice in flag.choices]
        lines.append(f"      '{name}') words=\"{' '.join([*places, *_options(own)])}\";;")
    lines += [
        "    esac;;",
        "  esac; fi",
        '  COMPREPLY=($(compgen -W "$words" -- "$word"))',
        '  case "$word" in -*) ;; *) COMPREPLY+=($(compgen -f -- "$word"));; esac',
        "}",
        "complete -o filenames -F _jaxserve jaxserve",
    ]
    return "\n".join(lines)


def _fish(flags: Mapping[str, list[Flag]], abouts: Mapping[str, str]) -> str:
    lines: list[str] = []
    for name in flags:
        first, _, second = name.partition(" ")
        at, word = (f"__fish_seen_subcommand_from {first}", second) if second else ("__fish_use_subcommand", first)
        lines.append(f"complete -c jaxserve -n '{at}' -f -a {word} -d {_quoted(abouts[name])}")
    lines.append("complete -c jaxserve -n __fish_use_subcommand -f -a bench -d 'Run a benchmark.'")
    for name, own in flags.items():
        here = " && ".join(f"__fish_seen_subcommand_from {word}" for word in name.split())
        if " " not in name:  # `bench serve` is not `serve`
            here += " && not __fish_seen_subcommand_from bench"
        for flag in own:
            if not flag.is_option:
                if flag.choices:
                    lines.append(f"complete -c jaxserve -n '{here}' -f -a '{' '.join(flag.choices)}'")
                continue
            value = f" -x -a '{' '.join(flag.choices)}'" if flag.choices else "" if flag.base is bool else " -r"
            about = _quoted(flag.help.partition(". ")[0])
            lines.append(f"complete -c jaxserve -n '{here}' -l {flag.option[2:]}{value} -d {about}")
            if flag.negative and flag.default is not False:
                lines.append(f"complete -c jaxserve -n '{here}' -l {flag.negative[2:]} -d {about}")
    return "\n".join(lines)


def _quoted(text: str) -> str:
    return "'" + text.replace("\\", "\\\\").replace("'", "\\'") + "'"
