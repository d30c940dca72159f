package testslave_test

import (
	"slices"
	"testing"

	"github.com/fairlead-io/fairlead/tools/testslave"
)

func TestSlave(t *testing.T) {
	s := testslave.Start(t)
	s.Set("holding", 10, 1, 2, 65535)
	if got := s.Get("holding", 10, 3); !slices.Equal(got, []uint16{1, 2, 65535}) {
		t.Errorf("holding 10..12: got %v", got)
	}
	s.Set("coil", 3, 1)
	if got := s.Get("coil", 2, 2); !slices.Equal(got, []uint16{0, 1}) {
		t.Errorf("coils 2..3: got %v", got)
	}
	if n, when := s.Writes("holding", 10), s.When("holding", 10); n != 0 || !when.IsZero() {
		t.Errorf("the control channel counts as a client: %d writes, last %v", n, when)
	}
	s.Pause()
	s.Resume()
	addr := s.Addr
	s.Kill()
	if err := s.Restart(); err != nil {
		t.Fatal(err)
	}
	if s.Addr != addr || s.Get("holding", 10)[0] != 0 {
		t.Errorf("after a restart: address %s, want %s; register %d, want 0", s.Addr, addr, s.Get("holding", 10)[0])
	}
}
