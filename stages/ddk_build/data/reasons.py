"""Reasons to skip a row or a document."""

NULL = "null"
EMPTY = "empty"
NOT_TEXT = "not a string"
NOT_UTF8 = "not valid UTF-8"
ONE_TOKEN = "one token"
NOT_MESSAGES = "not a list of messages with roles"
NO_CONTENT = "a message with neither content nor tool_calls"
NOT_TOOLS = "tools are not a list"
NOT_LOGPROBS = "not a log-probability for each token with loss"
NOT_TOKENS = "not a list of token ids, or another column differs in length"
PARTS = "content in parts, which the chat template does not support"
REFUSED = "refused by the chat template"
UNMARKED = "with turns of the assistant that {% generation %} does not mark one by one"
ASSISTANT_FIRST = "begins with the assistant, which the chat template does not support"
NOT_PREFIX = "a teacher prefix that is not a string"
LONG_PREFIX = "a teacher prefix that is longer than a row"
LOW_SCORE = "a score below min_score"
NO_LOSS = "no token that carries loss"


class Skip(Exception):
    """A row has no document; the message is the reason."""

    def __init__(self, reason: str, detail: str = "") -> None:
        super().__init__(reason)
        self.detail = detail
