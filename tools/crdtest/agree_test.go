package crdtest_test

import (
	"path/filepath"
	"strings"
	"testing"

	"sigs.k8s.io/yaml"

	"github.com/fairlead-io/fairlead/schemas/device"
)

// lossy are the cases in which the policy refuses what Go's arithmetic takes:
// the API server has already rounded the number when anybody sees it.
var lossy = map[string]bool{"device-uint64-number-too-wide": true}

// TestPolicyAgreesWithDecode holds device.Property.Decode, by which the edge
// refuses a local wish, against the verdicts of the admission policy.
func TestPolicyAgreesWithDecode(t *testing.T) {
	files, err := filepath.Glob("testdata/cases/device-*.yaml")
	if err != nil {
		t.Fatal(err)
	}
	compared := 0
	for _, file := range files {
		want, reject, before, subject := readCase(t, file)
		name := strings.TrimSuffix(filepath.Base(file), ".yaml")
		if reject && !strings.Contains(want, "is ") && !strings.Contains(want, "fit") && !strings.Contains(want, "cannot be written") && !strings.Contains(want, "no such property") {
			continue // refused by the schema
		}
		var d struct{ Spec device.Spec }
		if err := yaml.Unmarshal([]byte(subject), &d); err != nil {
			t.Fatalf("%s: %v", file, err)
		}
		var model *device.ModelSpec
		for _, doc := range before {
			var m struct {
				Metadata struct{ Name string }
				Spec     device.ModelSpec
			}
			if err := yaml.Unmarshal([]byte(doc), &m); err != nil {
				t.Fatalf("%s: %v", file, err)
			}
			if m.Metadata.Name == d.Spec.Model {
				model = &m.Spec
			}
		}
		if model == nil || len(d.Spec.Desired) == 0 {
			continue
		}
		compared++
		if why := decode(model, d.Spec); (why != "") != reject && !lossy[name] {
			t.Errorf("%s: the policy's verdict is reject %t, Go's %q", name, reject, why)
		}
	}
	if compared < 30 {
		t.Errorf("only %d cases were compared", compared)
	}
}

// decode says why Go refuses one of the device's wishes, or nothing.
func decode(model *device.ModelSpec, spec device.Spec) string {
	resolved := device.Device{Properties: model.Properties}
	for name, v := range spec.Desired {
		p, ok := resolved.Property(name)
		if !ok {
			return "unknown property " + name
		}
		if !p.Access.Writable() {
			return "read-only property " + name
		}
		if _, err := p.Decode(v); err != nil {
			return err.Error()
		}
	}
	return ""
}
