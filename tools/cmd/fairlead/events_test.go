package main

import (
	"encoding/json"
	"net"
	"net/http"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/fairlead-io/fairlead/broker"
	"github.com/fairlead-io/fairlead/schemas/access"
)

// bus opens a node's bus in the data folder, with an event log.
func bus(t *testing.T, dir string) *broker.Broker {
	t.Helper()
	b, err := broker.Open(broker.Options{
		Dir: filepath.Join(dir, "store"), Node: node, EventBytes: 1 << 20,
		Authenticate: func(broker.ConnectInfo) (access.Identity, error) { return access.Identity{}, nil },
	})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = b.Close() })
	return b
}

// The backlog is the running agent's, and without one it is read from the store.
func TestEventsBacklog(t *testing.T) {
	dir := t.TempDir()
	b := bus(t, dir)
	for range 3 {
		if err := b.Publish(t.Context(), broker.Message{Topic: "fl/plant-7/event/alarm", Payload: []byte("dry run"), QoS: 1}); err != nil {
			t.Fatal(err)
		}
	}
	want := b.EventBacklog()
	backlog := func() (row backlogRow) {
		t.Helper()
		r := fairlead(t, "events", "backlog", "--data", dir, "-o", "json")
		if r.err != nil {
			t.Fatal(r)
		}
		if err := json.Unmarshal(r.out.Bytes(), &row); err != nil {
			t.Fatalf("%v: %s", err, r.out.String())
		}
		return row
	}
	if r := fairlead(t, "events", "backlog", "--data", dir); r.err == nil || !strings.Contains(r.err.Error(), "admin.sock") || !strings.Contains(r.err.Error(), "in use") {
		t.Errorf("a store in use, no socket: %s", r)
	}
	if err := b.Close(); err != nil {
		t.Fatal(err)
	}
	for range 2 { // reading it leaves it as it was
		if got := backlog(); got.Events != 3 || got.Bytes != want.Bytes || got.Oldest.UnixMilli() != want.Oldest || got.Dropped != 0 {
			t.Errorf("got %+v, want %+v", got, want)
		}
	}
	b = bus(t, dir)
	if got := b.EventBacklog(); got != want {
		t.Errorf("the store says %+v, want %+v", got, want)
	}

	l, err := net.Listen("unix", filepath.Join(dir, "admin.sock"))
	if err != nil {
		t.Fatal(err)
	}
	mux := http.NewServeMux()
	mux.HandleFunc("GET /events/backlog", func(w http.ResponseWriter, _ *http.Request) {
		_ = json.NewEncoder(w).Encode(broker.EventBacklog{Count: 20417, Bytes: 4_200_000, Oldest: now - 7200_000, Dropped: 12})
	})
	srv := &http.Server{Handler: mux, ReadHeaderTimeout: time.Second}
	done := make(chan struct{})
	go func() { defer close(done); _ = srv.Serve(l) }()
	t.Cleanup(func() { _ = srv.Close(); <-done })
	if got := backlog(); got.Events != 20417 || got.Oldest.UnixMilli() != now-7200_000 {
		t.Errorf("the agent said %+v", got)
	}
	r := fairlead(t, "events", "backlog", "--data", dir)
	if got := strings.Fields(r.out.String()); strings.Join(got, " ") != "EVENTS SIZE OLDEST DROPPED 20417 4.2 MB 2h 12" {
		t.Errorf("got %v", r)
	}
}

func TestEventsMistakes(t *testing.T) {
	for args, want := range map[string]string{
		"events backlog":                                  "give --data",
		"events backlog --data " + t.TempDir():            "store",
		"events backlog --data x --broker mqtt://a":       "give --data alone",
		"events backlog --data " + t.TempDir() + " extra": "unknown command",
	} {
		if r := fairlead(t, strings.Fields(args)...); r.err == nil || !strings.Contains(r.err.Error(), want) {
			t.Errorf("%s: %s", args, r)
		}
	}
}
