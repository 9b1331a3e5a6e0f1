"""Text in, text out: tokenization, validation, detokenization and parsing in front of one engine. Imports no torch."""
