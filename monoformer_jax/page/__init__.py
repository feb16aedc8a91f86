"""The web page: its conversations, how they are shown, and what protects the server."""
