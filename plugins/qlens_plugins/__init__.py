"""The plugins that come with QLens: one folder per stage, one module per plugin."""
