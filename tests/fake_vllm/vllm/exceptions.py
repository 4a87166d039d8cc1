"""Of 0.33.0: what is wrong with a request is no ValueError there. (0.20.2: `VLLMValidationError(ValueError)`.)"""


class VLLMError(Exception):
    pass


class VLLMClientError(VLLMError):
    pass


class VLLMValidationError(VLLMClientError):
    pass
