package crd_test

import (
	"strings"
	"testing"

	"github.com/fairlead-io/fairlead/schemas/crd"
)

func TestAll(t *testing.T) {
	var names []string
	for _, f := range crd.All() {
		names = append(names, f.Name)
		if !strings.Contains(string(f.YAML), "kind: CustomResourceDefinition\n") || strings.Contains(string(f.YAML), "\n---") {
			t.Errorf("%s: want one definition", f.Name)
		}
	}
	if got := strings.Join(names, " "); got != "devicemodels.yaml devices.yaml" {
		t.Errorf("definitions: %s", got)
	}
}
