package cri

import (
	"context"
	"errors"
	"log/slog"
	"testing"
	"time"

	"github.com/fairlead-io/fairlead/tools/testruntime"
)

// TestWatchEnds: the watch ends with its ctx, though changes go on.
func TestWatchEnds(t *testing.T) {
	rt := testruntime.Start(t)
	c, err := Dial(rt.Socket, slog.New(slog.DiscardHandler))
	if err != nil {
		t.Fatal(err)
	}
	defer c.Close()
	ctx, cancel := context.WithCancel(t.Context())
	defer cancel()
	busy := source{name: "busy", subscribe: func(ctx context.Context, _ *Client) (func() (change, error), error) {
		return func() (change, error) {
			<-ctx.Done()
			return change{id: "x"}, nil
		}, nil
	}}
	done := make(chan error)
	go func() {
		_, err := c.follow(ctx, busy, func(string) { cancel() })
		done <- err
	}()
	select {
	case err := <-done:
		if !errors.Is(err, context.Canceled) {
			t.Error(err)
		}
	case <-time.After(time.Minute):
		t.Fatal("it goes on")
	}
}
