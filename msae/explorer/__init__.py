"""What a person explores: the examples, pictures and page of one SAE and its hierarchy."""
