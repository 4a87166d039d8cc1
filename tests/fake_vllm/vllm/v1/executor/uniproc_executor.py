import socket


class UniProcExecutor:
    """Of vLLM's: where its one rank meets itself."""

    def _distributed_args(self):
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            return f"tcp://127.0.0.1:{free.getsockname()[1]}", 0, 0
