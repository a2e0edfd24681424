package bouncer

import "testing"

// TestExampleIsAccepted holds the example configuration to the code.
func TestExampleIsAccepted(t *testing.T) {
	c, err := Load("../deploy/bouncer/bouncer.yaml")
	if err != nil {
		t.Fatal(err)
	}
	if c.Mode != Observe || len(c.Protect.Cluster) != 2 || !c.Listen.IsValid() {
		t.Errorf("understood as %+v", c)
	}
}
