"""From documents to the packed rows of the two splits. Pure."""
