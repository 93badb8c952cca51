"""What was spent: a signed chain of entries at the site, its cap, its export and its successor."""
