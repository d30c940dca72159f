package evict

import (
	"os"
	"testing"
	"time"

	"go.uber.org/goleak"
)

func TestMain(m *testing.M) {
	if os.Getenv("EVICT_TEST_EAT") != "" {
		eat()
	}
	goleak.VerifyTestMain(m)
}

// eat takes 32 MiB once it is told to, and holds them until it is killed.
func eat() {
	_, _ = os.Stdin.Read(make([]byte, 1))
	b := make([]byte, 32<<20)
	for i := range b {
		b[i] = 1
	}
	for {
		time.Sleep(time.Hour)
		b[0]++
	}
}
