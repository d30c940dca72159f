package cloudbridge

import (
	"bytes"
	"fmt"
	"log/slog"
	"strings"
	"testing"

	"github.com/prometheus/client_golang/prometheus"

	"github.com/fairlead-io/fairlead/broker/repair"
	"github.com/fairlead-io/fairlead/schemas/payload"
	"github.com/fairlead-io/fairlead/schemas/topic"
)

// Two agents with one name are told from one that is restarted: the epoch of
// one comes back.
func TestClones(t *testing.T) {
	for _, tc := range []struct {
		name, epochs string // one letter each; a dot is an agent of before epochs
		want         float64
	}{
		{"connections of one agent", "aaaa", 0},
		{"restarts", "abcd", 0},
		{"a clone takes over", "ab", 0},
		{"and is taken over", "aba", 1},
		{"for ever", "aababab", 4},
		{"one of them restarts", "abac", 1},
		{"old agents", "....", 0},
		{"an old agent is updated", "..aa", 0},
	} {
		t.Run(tc.name, func(t *testing.T) {
			var log bytes.Buffer
			b := &Bridge{log: slog.New(slog.NewTextHandler(&log, nil)), inbox: repair.NewInbox(repair.InboxConfig{Direction: topic.Reported})}
			b.metrics = newMetrics(nil, b)
			for i, e := range strings.ReplaceAll(tc.epochs, ".", " ") {
				l := payload.Link{Online: true, Since: int64(i), Epoch: strings.TrimSpace(string(e)), Host: "host-" + string(e)}
				b.linked("plant-7", payload.Encode(l))
				b.linked("plant-7", payload.Encode(l)) // said again
				l.Online = false
				b.linked("plant-7", payload.Encode(l))
				b.linked("plant-8", payload.Encode(payload.Link{Online: true, Epoch: fmt.Sprint(i)}))
				b.linked("plant-7", nil)
				b.linked("plant-7", []byte("x"))
			}
			reg := prometheus.NewRegistry()
			reg.MustRegister(b.metrics.clones)
			families, err := reg.Gather()
			if err != nil {
				t.Fatal(err)
			}
			if got := families[0].GetMetric()[0].GetCounter().GetValue(); got != tc.want {
				t.Errorf("counted %g, want %g", got, tc.want)
			}
			if tc.want > 0 && (!strings.Contains(log.String(), "host-a") || !strings.Contains(log.String(), "host-b")) {
				t.Errorf("the log does not say who: %s", &log)
			}
		})
	}
}
