"""Does it defend, what does it cost, and how sure are we: suites, arms, judges, statistics, reports."""
