package controlplane

import (
	"bytes"
	"errors"
	"fmt"
	"net"
	"os"
	"slices"
	"strings"
	"testing"
)

func TestLockRefusesASecondOne(t *testing.T) {
	f := testFolder(t)
	first, err := f.lock(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	_, err = f.lock(t.Context())
	if !errors.Is(err, ErrUsage) {
		t.Fatalf("second lock: %v; want ErrUsage", err)
	}
	for _, want := range []string{f.root, fmt.Sprintf("kill %d", os.Getpid()), "--dir"} {
		if !strings.Contains(err.Error(), want) {
			t.Errorf("error %q does not say %q", err, want)
		}
	}
	if err := first.Close(); err != nil {
		t.Fatal(err)
	}
	again, err := f.lock(t.Context())
	if err != nil {
		t.Fatalf("after the first was closed: %v", err)
	}
	if err := again.Close(); err != nil {
		t.Fatal(err)
	}
}

func TestListenKeepsThePortOfTheLastRun(t *testing.T) {
	f := testFolder(t)
	port := func(l net.Listener) int { return l.Addr().(*net.TCPAddr).Port }
	first, err := f.listen(loopback, 0)
	if err != nil {
		t.Fatal(err)
	}
	if err := first.Close(); err != nil {
		t.Fatal(err)
	}
	again, err := f.listen(loopback, 0)
	if err != nil {
		t.Fatal(err)
	}
	defer again.Close()
	if port(again) != port(first) {
		t.Errorf("port %d, want %d as before", port(again), port(first))
	}
	// Now it is in use: another one if any will do, an error if it was asked for.
	other, err := f.listen(loopback, 0)
	if err != nil {
		t.Fatal(err)
	}
	defer other.Close()
	if port(other) == port(first) {
		t.Errorf("port %d twice", port(other))
	}
	_, err = f.listen(loopback, port(first))
	if !errors.Is(err, ErrUsage) || !strings.Contains(err.Error(), fmt.Sprintf("port %d", port(first))) {
		t.Errorf("error %v; want ErrUsage that names port %d", err, port(first))
	}
	// An address of a reserved range, which no machine has.
	if _, err := f.listen(net.IPv4(240, 0, 0, 1), 0); !errors.Is(err, ErrUsage) {
		t.Errorf("listen on an address of another machine: %v; want ErrUsage", err)
	}
}

func TestOptionsWithoutFolder(t *testing.T) {
	if err := Run(t.Context(), Options{}); !errors.Is(err, ErrUsage) {
		t.Errorf("error %v; want ErrUsage", err)
	}
}

func TestLogWriterNamesLinesAndKeepsErrors(t *testing.T) {
	var log bytes.Buffer
	w := &logWriter{name: Etcd, k: &children{log: &log}}
	for _, part := range []string{"I1122 fine\nE11", "22 not fine\n", `{"level":"fatal","msg":"x"}` + "\nEvent", " is no error\nrest"} {
		if n, err := w.Write([]byte(part)); n != len(part) || err != nil {
			t.Fatalf("write: %d, %v", n, err)
		}
	}
	w.flush()
	const want = "etcd | I1122 fine\netcd | E1122 not fine\netcd | {\"level\":\"fatal\",\"msg\":\"x\"}\netcd | Event is no error\netcd | rest\n"
	if log.String() != want {
		t.Errorf("log\n%s\nwant\n%s", log.String(), want)
	}
	if got := w.lastErrors(); got != "  E1122 not fine\n  {\"level\":\"fatal\",\"msg\":\"x\"}" {
		t.Errorf("last errors %q", got)
	}

	log.Reset()
	if _, err := w.Write(bytes.Repeat([]byte("x"), 3*maxLine)); err != nil {
		t.Fatal(err)
	}
	if len(w.part) >= maxLine {
		t.Errorf("%d bytes without a line end are held", len(w.part))
	}
}

func TestChildEnv(t *testing.T) {
	got := childEnv(APIServer, []string{"A=1", "HTTPS_PROXY=http://proxy", "http_proxy=http://proxy", "NO_PROXY=x"})
	if want := []string{"A=1", "NO_PROXY=x", "GOGC=50"}; !slices.Equal(got, want) {
		t.Errorf("got %q, want %q", got, want)
	}
	got = childEnv(APIServer, []string{"GOGC=100"})
	if want := []string{"GOGC=100"}; !slices.Equal(got, want) {
		t.Errorf("got %q, want %q", got, want)
	}
}
