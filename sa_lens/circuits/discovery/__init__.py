"""Methods that find circuits: ACDC, EAP, EAP-IG, RelP, exact effects of single edges, and the gate's own masks."""
