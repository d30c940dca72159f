package main

import (
	"bytes"
	"os"
	"path/filepath"
	"strings"
	"testing"
)

func TestRun(t *testing.T) {
	file := filepath.Join(t.TempDir(), "file")
	if err := os.WriteFile(file, nil, 0o600); err != nil {
		t.Fatal(err)
	}
	for _, x := range []struct {
		args string
		out  string
		err  string // empty for none
	}{
		{"version", version, ""},
		{"--help", "--token-file", ""},
		{"run --help", "--token-file", ""},
		{"", "Usage:", "want the command run, images or version"},
		{"start", "Usage:", "want the command run, images or version"},
		{"run now", "Usage:", "want the command run, images or version"},
		{"run --nod x", "", "unknown flag: --nod"},
		{"run --keepalive 5", "", "missing unit"},
		{"run --node plant-7 --data " + file + " --log-level loud", "", "want debug, info, warn or error"},
		{"run", "", "give --node"},
		{"run --node plant-7", "", "give --data"},
		{"run --node plant-7 --data " + file, "", "data folder"},
		{"run --node plant-7 --data " + file + " --cloud mqtt://cloud", "", "--token-file"},
	} {
		var out bytes.Buffer
		err := run(strings.Fields(x.args), &out)
		if !strings.Contains(out.String(), x.out) {
			t.Errorf("%s: want %q, got %q", x.args, x.out, out.String())
		}
		if (err == nil) != (x.err == "") || err != nil && !strings.Contains(err.Error(), x.err) {
			t.Errorf("%s: want the error %q, got %v", x.args, x.err, err)
		}
	}
}
