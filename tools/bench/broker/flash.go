package main

import (
	"bufio"
	"context"
	"errors"
	"fmt"
	"net/http"
	"os"
	"os/exec"
	"path/filepath"
	"strconv"
	"strings"
	"time"

	"github.com/fairlead-io/fairlead/tools/bench/machine"
)

// wear is what a process did to its disk so far.
type wear struct {
	written float64 // B
	syncs   float64 // synced commits, as the broker counts them
	at      time.Time
}

func (s *site) wear(ctx context.Context) (w wear, err error) {
	if w.syncs, err = s.metric(ctx, "fairlead_broker_store_sync_seconds_count"); err != nil {
		return w, err
	}
	w.written, err = machine.WrittenOf(s.proc.PID())
	w.at = time.Now()
	return w, err
}

// metric reads one value of the node's metrics.
func (s *site) metric(ctx context.Context, name string) (float64, error) {
	req, err := http.NewRequestWithContext(ctx, http.MethodGet, "http://"+s.metrics+"/metrics", http.NoBody)
	if err != nil {
		return 0, err
	}
	resp, err := http.DefaultClient.Do(req)
	if err != nil {
		return 0, err
	}
	defer func() { _ = resp.Body.Close() }()
	for l := bufio.NewScanner(resp.Body); l.Scan(); {
		if v, ok := strings.CutPrefix(l.Text(), name+" "); ok {
			return strconv.ParseFloat(v, 64)
		}
	}
	return 0, fmt.Errorf("no metric %s at %s", name, s.metrics)
}

// tracer counts a process's sync calls with strace.
type tracer struct {
	cmd *exec.Cmd
	out string
}

// trace attaches strace; nil where it is not there or may not.
func (b *bench) trace(pid int) *tracer {
	path, err := exec.LookPath("strace")
	if err != nil {
		return nil
	}
	t := &tracer{out: filepath.Join(b.dir, "strace")}
	t.cmd = exec.Command(path, "-f", "-c", "-U", "calls,name", "-e", "trace=fsync,fdatasync,sync_file_range,msync,syncfs", "-o", t.out, "-p", strconv.Itoa(pid))
	if t.cmd.Start() != nil {
		return nil
	}
	return t
}

// calls ends the trace and gives how often each call was made; nil if it could
// not be had.
func (t *tracer) calls() map[string]float64 {
	if t == nil {
		return nil
	}
	_ = t.cmd.Process.Signal(os.Interrupt)
	_ = t.cmd.Wait() // ends with the signal
	text, err := os.ReadFile(t.out)
	if err != nil || len(text) == 0 {
		return nil
	}
	out := map[string]float64{}
	for line := range strings.Lines(string(text)) {
		f := strings.Fields(line)
		if len(f) == 2 && f[1] != "total" {
			if n, err := strconv.ParseFloat(f[0], 64); err == nil {
				out[f[1]] = n
			}
		}
	}
	return out
}

// flashFigure is what a gateway's flash wears from readings, and from nothing.
func (b *bench) flashFigure(ctx context.Context) error {
	const devices, rate, idle = 50, 500, time.Minute
	checkpoint := b.checkpoint
	s, err := b.startSite(ctx, devices, "--checkpoint", checkpoint.String())
	if err != nil {
		return err
	}
	defer s.stop()
	ctx, cancel := context.WithCancel(ctx)
	defer cancel()
	say("%d changes a second of %d devices with %d properties for %s, a checkpoint every %s", rate, devices, properties, b.flash, checkpoint)
	var n counters
	p, err := s.mapper(ctx, &n, func(n int64) string { return strconv.FormatFloat(float64(n%100000)/100, 'f', 2, 64) })
	if err != nil {
		return err
	}
	done := make(chan error, 2)
	go func() { _, err := pace(ctx, []*publisher{p}, rate, &n); done <- err }()
	go func() { done <- p.acks() }()
	begin := func() (wear, error) {
		pause(ctx, 5*time.Second)
		return s.wear(ctx)
	}
	w0, err := begin()
	if err != nil {
		return err
	}
	tr := b.trace(s.proc.PID())
	a0 := n.acked.Load()
	select {
	case err := <-done:
		return fmt.Errorf("the mapper ended: %w", err)
	case <-ctx.Done():
		return ctx.Err()
	case <-time.After(b.flash):
	}
	calls := tr.calls()
	w1, err := s.wear(ctx)
	if err != nil {
		return err
	}
	acked := float64(n.acked.Load()-a0) / w1.at.Sub(w0.at).Seconds()
	n.stop.Store(true)
	for range 2 {
		if err := <-done; err != nil && !errors.Is(err, os.ErrDeadlineExceeded) {
			return err
		}
	}
	// An hour has 60 checkpoints, whatever is asked for: a checkpoint writes every
	// property once if there was time to change them all, after 10 s as after 60.
	hour := func(v float64, from, to wear) float64 {
		return v * 60 * checkpoint.Seconds() / to.at.Sub(from.at).Seconds()
	}
	how := fmt.Sprintf("extrapolated from %s with a checkpoint every %s to 60 of them, %.0f changes/s acknowledged", w1.at.Sub(w0.at).Round(time.Second), checkpoint, acked)
	b.r.add(figure{Name: "flash: written for 500 changes/s", Unit: "MB/h", Ours: []float64{hour(w1.written-w0.written, w0, w1) / 1e6}, Bound: atMost(40), Detail: how + "; write_bytes of /proc/PID/io"})
	syncs := figure{Name: "flash: syncs for 500 changes/s", Unit: "/h", Ours: []float64{hour(w1.syncs-w0.syncs, w0, w1)}, Bound: atMost(4000), Detail: how + "; synced commits as the broker counts them, there is no strace"}
	if calls != nil {
		total := calls["fsync"] + calls["fdatasync"] + calls["msync"] + calls["syncfs"]
		syncs.Detail = fmt.Sprintf("%s; fsync and fdatasync calls that strace counted; the broker counts %.0f synced commits/h; sync_file_range %.0f/h", how, syncs.Ours[0], hour(calls["sync_file_range"], w0, w1))
		syncs.Ours[0] = hour(total, w0, w1)
	}
	b.r.add(syncs)

	say("idle for %s, once the last readings are written", idle)
	pause(ctx, checkpoint)
	if w0, err = begin(); err != nil {
		return err
	}
	tr = b.trace(s.proc.PID())
	pause(ctx, idle)
	calls = tr.calls()
	if w1, err = s.wear(ctx); err != nil {
		return err
	}
	b.r.add(figure{
		Name: "flash: written by an idle gateway", Unit: "B/h", Ours: []float64{(w1.written - w0.written) * float64(time.Hour) / float64(w1.at.Sub(w0.at))}, Bound: atMost(0),
		Detail: fmt.Sprintf("extrapolated from %s with an idle mapper connected; synced commits %.0f, sync calls %v", w1.at.Sub(w0.at).Round(time.Second), w1.syncs-w0.syncs, calls),
	})
	return ctx.Err()
}
