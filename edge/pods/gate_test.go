package pods

import (
	"context"
	"errors"
	"testing"
	"testing/synctest"
)

func TestGate(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		g := newGate(1)
		if err := g.enter(t.Context(), toClear); err != nil {
			t.Fatal(err)
		}
		var got []rank
		for _, r := range []rank{toClear, toBegin, toStart, toBegin} {
			go func() {
				if g.enter(t.Context(), r) == nil {
					got = append(got, r) // one at a time is in
					g.leave()
				}
			}()
			synctest.Wait()
		}
		ctx, cancel := context.WithCancel(t.Context())
		gaveUp := make(chan error)
		go func() { gaveUp <- g.enter(ctx, toStart) }()
		synctest.Wait()
		cancel()
		if err := <-gaveUp; !errors.Is(err, context.Canceled) {
			t.Errorf("gave up with %v", err)
		}
		g.leave()
		synctest.Wait()
		if want := []rank{toStart, toBegin, toBegin, toClear}; len(got) != 4 || got[0] != want[0] || got[1] != want[1] || got[2] != want[2] || got[3] != want[3] {
			t.Errorf("order %v; want %v", got, want)
		}
		if g.free != 1 {
			t.Errorf("%d free places; want 1", g.free)
		}
	})
}
