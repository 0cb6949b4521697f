from tests.support.commands import command, one_thread, site, write_run

__all__ = ["command", "one_thread", "site", "write_run"]
