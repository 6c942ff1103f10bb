"""What a run did, as text, JSON and a web page."""
