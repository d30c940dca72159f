package main

import (
	"bytes"
	"strings"
	"testing"
)

func TestCommandLine(t *testing.T) {
	for _, c := range []struct{ args, out, err string }{
		{"version", buildVersion(), ""},
		{"run", "", `required flag(s) "node" not set`},
		{"run --node plant-7 --protocol bacnet", "", `protocol "bacnet" is not known`},
		{"run --node Plant_7", "", `node "Plant_7"`},
		{"run --node plant-7 --bus gopher://x", "", "gopher"},
		{"run --node plant-7 --log-level LOUD", "", "LOUD"},
		{"run --node plant-7 --metrics nowhere:x", "", "metrics endpoint"},
	} {
		cmd := command()
		var out bytes.Buffer
		cmd.SetOut(&out)
		cmd.SetErr(&bytes.Buffer{})
		cmd.SetArgs(strings.Fields(c.args))
		err := cmd.ExecuteContext(t.Context())
		switch {
		case c.err == "" && err != nil, c.err != "" && (err == nil || !strings.Contains(err.Error(), c.err)):
			t.Errorf("%s: got error %v; want %q", c.args, err, c.err)
		case !strings.Contains(out.String(), c.out):
			t.Errorf("%s: got %q; want %q", c.args, out.String(), c.out)
		}
	}
}
