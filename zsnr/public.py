"""Removal of passwords, tokens, signatures and commands from published text and settings."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Mapping
from typing import Any
from urllib.parse import urlsplit, urlunsplit

MARK = "***"
"""Replacement of removed values in a saved config."""

_NAMES = r"(?:password|passwd|secret|credentials?|(?:api|access|secret)[_-]?key|token|cookie)s?"
_SECRET_KEY = re.compile(rf"(?i)(?:^|[_-])(?:{_NAMES}|(?:proxy-)?authorization|headers?)$")
_FLAG = re.compile(rf"(?i)(--?[\w-]*{_NAMES}[ =])\S+")
_MARKED = re.compile(r"^(?:pipe:)?\*\*\*$|://\*\*\*@|\?\*\*\*(?:$|::)")
_ADDRESS = re.compile(r"(?i)\b[a-z][a-z0-9+.-]*://[^\s'\"<>]+")


def public_text(text: str) -> str:
    """Return a message or log line without the secrets in addresses, flags and headers."""
    text = _ADDRESS.sub(lambda match: _address_in_text(match[0]), text)
    text = _FLAG.sub(rf"\1{MARK}", text)
    return re.sub(r"(?i)\b(authorization['\"]?\s*[:=]\s*).*", rf"\1{MARK}", text)


def public_url(url: str) -> str:
    """Return a source's name for messages and files, without users, passwords or signatures.

    A command is replaced by its last word that ends in ".tar", else by a digest. Names that are
    already public are returned unchanged.
    """
    if not url.startswith("pipe:"):
        return _address(url)
    if url.startswith("pipe:..."):
        return url
    words = [_address(word) for word in re.split(r"[\s'\"|;<>&()=]+", url)]
    names = [word for word in words if word.endswith(".tar")]
    digest = hashlib.blake2b(url.encode(errors="surrogateescape"), digest_size=4).hexdigest()
    return f"pipe:... {names[-1]}" if names else f"pipe:.../{digest}"


def public(value: Any, mark: str = "") -> Any:
    """Return plain values without secrets.

    Args:
        value: Settings: mappings, lists and plain values. Users, passwords, queries and fragments
            of addresses are removed, and the commands of pipes, and the values of settings named
            token, password, headers and so on.
        mark: Replacement of removed parts. "" = nothing, or "..." for a complete value.
    """
    if isinstance(value, Mapping):
        return {
            name: (mark or "...")
            if part is not None and isinstance(name, str) and _SECRET_KEY.search(name)
            else public(part, mark)
            for name, part in value.items()
        }
    if isinstance(value, list | tuple):
        return [public(part, mark) for part in value]
    if not isinstance(value, str):
        return value
    if value.startswith("pipe:"):
        return f"pipe:{mark or '...'}"
    return "::".join(_address(part, mark) for part in value.split("::"))


def left_out(value: Any, name: str = "") -> list[str]:
    """List the settings from which something was removed when they were saved with the mark."""
    if isinstance(value, Mapping):
        parts = [(f"{name}.{key}" if name else str(key), part) for key, part in value.items()]
    elif isinstance(value, list | tuple):
        parts = [(name, part) for part in value]
    else:
        return [name] if isinstance(value, str) and _MARKED.search(value) else []
    return list(dict.fromkeys(lost for key, part in parts for lost in left_out(part, key)))


def _address(text: str, mark: str = "") -> str:
    if "://" not in text or text.startswith("file:"):
        return text
    try:
        parts = urlsplit(text)
    except ValueError:  # its secret parts cannot be identified
        return mark or "..."
    is_http = parts.scheme in ("http", "https")
    user, at, host = parts.netloc.rpartition("@")
    if at and not is_http and ":" not in user:
        host = parts.netloc  # a container of Azure's is not secret
    elif at and mark:
        host = f"{mark}@{host}"
    query, fragment = parts.query, parts.fragment
    if query and (is_http or "=" in query):  # elsewhere ? is a pattern
        query = mark
    if is_http:
        fragment = ""
    return urlunsplit((parts.scheme, host, parts.path, query, fragment))


def _address_in_text(text: str) -> str:
    end = text.rstrip(".,:;)]")
    return _address(end) + text[len(end) :]
