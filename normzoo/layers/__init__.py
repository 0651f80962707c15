"""What each norm computes: ``base`` holds the contract, ``members`` lists the norms, then one file for each family."""
