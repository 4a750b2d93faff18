"""A click group that suggests near names."""

import click

from mergequant.steps import near_name

__all__ = ["Group"]


class Group(click.Group):
    """Commands are listed in the order in which they were added; a misspelt one gets a suggestion."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        """Names in the order of a user's work."""
        return list(self.commands)

    def resolve_command(
        self, ctx: click.Context, args: list[str]
    ) -> tuple[str | None, click.Command | None, list[str]]:
        """As click; an unknown name is wrong use."""
        if not args[0].startswith("-") and args[0] not in self.commands:
            ctx.fail(f"unknown command {args[0]!r}{near_name(args[0], self.commands)}")
        return super().resolve_command(ctx, args)
