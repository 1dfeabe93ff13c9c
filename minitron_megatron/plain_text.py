"""Text of users and of files as text: what a terminal would obey, or that cannot be written, is shown escaped."""

import re

# Control characters, line and paragraph separators, those that turn the direction of writing, and halves of characters.
ODD = re.compile("[\x00-\x1f\x7f-\x9f\u2028\u2029\u202a-\u202e\u2066-\u2069\ud800-\udfff\ufffe\uffff]")


def escaped(text: str, keep: str = "\n\t") -> str:
    """The text with odd characters as Python writes them, as \\x1b; those of `keep` stay."""
    return ODD.sub(lambda odd: odd[0] if odd[0] in keep else odd[0].encode("unicode_escape").decode(), text)


def one_line(text: str) -> str:
    """The text in one line, whatever is in it."""
    return escaped(text, keep="")


def commented(*lines: str) -> str:
    """The head of a YAML file or a script: each text is one line behind `# `, and none of it is read as anything else."""
    return "".join(f"# {one_line(line)}\n" for line in lines)
