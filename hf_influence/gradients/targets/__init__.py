"""What the queries are to be good for where that is not their loss: any function, fairness, robustness."""
