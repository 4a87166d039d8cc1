def tokens_input(prompt_token_ids, *, prompt=None, cache_salt=None):
    made = {"type": "token", "prompt_token_ids": prompt_token_ids}
    return made if cache_salt is None else made | {"cache_salt": cache_salt}
