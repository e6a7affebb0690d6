"""How good a circuit is: faithfulness, completeness, minimality, and agreement with another circuit."""
