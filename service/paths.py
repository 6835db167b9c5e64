"""Path parameters that may be any text: `/{item_id:any_text}`. Importing this registers the convertor."""

from starlette.convertors import Convertor, register_url_convertor


class _AnyText(Convertor[str]):
    """The rest of a path, whatever it is: starlette's own ends before a line break, and so finds something else."""

    regex = r"[\s\S]+"

    def convert(self, value: str) -> str:
        return value

    def to_string(self, value: str) -> str:
        return value


register_url_convertor("any_text", _AnyText())
