package cgroup

import (
	"os"
	"testing"
	"time"

	"go.uber.org/goleak"
)

func TestMain(m *testing.M) {
	if os.Getenv("CGROUP_TEST_EAT") != "" {
		eat()
	}
	goleak.VerifyTestMain(m)
}

// eat holds 32 MiB until it is killed.
func eat() {
	b := make([]byte, 32<<20)
	for i := range b {
		b[i] = 1
	}
	_, _ = os.Stdout.WriteString("full\n")
	for {
		time.Sleep(time.Hour)
		b[0]++
	}
}
