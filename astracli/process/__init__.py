"""What every child process shares: its config, its reports, ports, health of a server, its own children."""
