package main

import (
	"bytes"
	"os"
	"regexp"
	"slices"
	"strings"
	"testing"
)

// The page of the agent names every flag, and no other, in its section about them.
func TestReadmeFlags(t *testing.T) {
	var help bytes.Buffer
	if err := run([]string{"run", "--help"}, &help); err != nil {
		t.Fatal(err)
	}
	b, err := os.ReadFile("../../README.md")
	if err != nil {
		t.Fatal(err)
	}
	_, section, ok := strings.Cut(string(b), "\n## Flags\n")
	if !ok {
		t.Fatal("edge/README.md has no section Flags")
	}
	section, _, _ = strings.Cut(section, "\n## ")
	has, told := names(help.String(), `(?m)^ +(?:-\w, )?--([a-z-]+)`), names(section, "`--([a-z-]+)`")
	if len(has) == 0 {
		t.Fatalf("no flags in\n%s", help.String())
	}
	for _, f := range has {
		if !slices.Contains(told, f) {
			t.Errorf("edge/README.md: --%s is missing in its section Flags", f)
		}
	}
	for _, f := range told {
		if !slices.Contains(has, f) {
			t.Errorf("edge/README.md: there is no flag --%s", f)
		}
	}
}

func names(text, pattern string) []string {
	var out []string
	for _, m := range regexp.MustCompile(pattern).FindAllStringSubmatch(text, -1) {
		out = append(out, m[1])
	}
	return out
}
