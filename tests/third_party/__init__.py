"""Methods as another package would add them: from the interface alone, each trying another part of it."""
