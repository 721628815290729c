"""Chat templates by name: Jinja files of ours, or the user's own."""

from pathlib import Path

from open_rm.errors import UserError, quote_error

TEMPLATE_FOLDER = Path(__file__).parent / "chat_templates"


def template_names() -> list[str]:
    """Names that --chat_template_name knows; each is a Jinja file in open_rm/data/chat_templates."""
    return sorted(path.stem for path in TEMPLATE_FOLDER.glob("*.jinja"))


def read_template(name: str) -> str:
    """The Jinja text of a named template or of a file."""
    known = TEMPLATE_FOLDER / f"{name}.jinja"
    path = known if known.is_file() else Path(name)
    if not path.is_file():
        raise UserError(
            f"--chat_template_name {name}: neither a file nor a known name; the names are {', '.join(template_names())}"
        )
    # One trailing newline belongs to the file, not to the template: it would become the scored token.
    try:
        return path.read_text(encoding="utf-8").removesuffix("\n")
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"--chat_template_name {name}: cannot be read as UTF-8 text ({quote_error(error)})") from error
