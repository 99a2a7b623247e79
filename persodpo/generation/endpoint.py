"""Settings of one OpenAI-compatible endpoint; they hold no secret, only the name of the variable that does."""

from __future__ import annotations

from typing import Annotated, Literal
from urllib.parse import urlsplit

from pydantic import Field

from persodpo.errors import PersodpoError
from persodpo.generation.budget import Prices
from persodpo.settings import Count, Positive, Section


class OpenAIEndpoint(Section):
    """One model behind one endpoint.

    Attributes:
        model: The model's name in all tables.
        served_as: The name the endpoint knows it by; None: the same.
        base_url: Address up to ``/v1``, without user name, password or query.
        api_key_env: Environment variable that holds the key; None for a server that asks for none.
        concurrency: Requests under way at a time.
        requests_per_minute: The endpoint's limit, None for none.
        tokens_per_minute: The same, prompts and longest answers together.
        timeout_seconds: Longest wait for one attempt, from sending to the last byte.
        attempts: How often a prompt is sent at most.
        longest_wait_seconds: Longest pause between two attempts; a server that asks for a longer one stops the model.
        token_limit: The field that the endpoint reads the longest answer from; newer OpenAI models want the second.
        json_keys: Keys, all text, of the JSON object that the endpoint must hold the model to; empty: no such schema.
        prices: Prices of the tokens; None if unknown, then no budget can be kept.
    """

    model: Annotated[str, Field(min_length=1)]
    served_as: str | None
    base_url: str
    api_key_env: str | None
    concurrency: Annotated[int, Field(ge=1, le=500)]
    requests_per_minute: Count | None
    tokens_per_minute: Count | None
    timeout_seconds: Positive
    attempts: Count
    longest_wait_seconds: Positive
    token_limit: Literal["max_tokens", "max_completion_tokens"]
    json_keys: tuple[str, ...]
    prices: Prices | None


def check_address(settings: OpenAIEndpoint) -> None:
    """Refuse an address that is none, or that a secret would be shown with.

    Raises:
        PersodpoError: Says how to write it; the address itself is not repeated.
    """
    if "@" in settings.base_url or "?" in settings.base_url:
        raise PersodpoError(
            f"base_url of model {settings.model} must hold no user name, password or query; put the key into an "
            "environment variable and name it in api_key_env."
        )
    try:
        parts = urlsplit(settings.base_url)
        usable = parts.scheme in {"http", "https"} and parts.hostname and parts.port != 0
    except ValueError:
        usable = False
    if not usable:
        raise PersodpoError(
            f"base_url of model {settings.model} is no address; write it like http://localhost:8000/v1."
        )
