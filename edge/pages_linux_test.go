package edge

import (
	"os"
	"regexp"
	"strconv"
	"testing"
)

// file is how many kilobytes of files the process maps.
func file(t *testing.T) int {
	t.Helper()
	b, err := os.ReadFile("/proc/self/smaps_rollup")
	if err != nil {
		t.Skip(err)
	}
	m := regexp.MustCompile(`Pss_File: +(\d+)`).FindSubmatch(b)
	if m == nil {
		t.Skip("this kernel does not tell what is mapped of files")
	}
	n, err := strconv.Atoi(string(m[1]))
	if err != nil {
		t.Fatal(err)
	}
	return n
}

func TestLetPagesGo(t *testing.T) {
	before := file(t)
	if err := letPagesGo(); err != nil {
		t.Fatal(err)
	}
	if after := file(t); after >= before {
		t.Errorf("%d kB of files mapped before, %d after", before, after)
	}
}
