package client

import (
	"context"
	"fmt"
	"slices"
	"testing"
	"testing/synctest"
	"time"

	"github.com/eclipse/paho.golang/packets"
)

// What arrives while OnMessages works comes with the next call, in order; it is
// acknowledged, in order, when it was handed over and OnMessages returned.
func TestBatches(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		up, goOn := make(chan struct{}), make(chan struct{})
		var calls [][]string
		broker := make(chan *fake, 1)
		cl := faked(t, Config{
			ReceiveMaximum: 4,
			OnUp:           func(context.Context) { close(up) },
			OnMessages: func(ms []Message) {
				var names []string
				for _, m := range ms {
					names = append(names, string(m.Topic))
				}
				calls = append(calls, names)
				<-goOn
			},
		}, func(f *fake) {
			f.connack()
			<-up
			broker <- f
		})
		stop, end := start(t, cl)
		f := <-broker
		say := func(from, to int, qos byte) {
			for i := from; i <= to; i++ {
				f.say(publishPacket(&Message{Topic: "a", QoS: qos}, uint16(i)))
			}
			synctest.Wait()
		}
		acks := func() (ids []uint16) {
			synctest.Wait()
			for {
				select {
				case p := <-f.in:
					if a, ok := p.Content.(*packets.Puback); ok {
						ids = append(ids, a.PacketID)
					}
				default:
					return ids
				}
			}
		}
		say(1, 1, 1)
		say(2, 4, 1)
		say(0, 0, 0)
		if len(calls) != 1 || len(calls[0]) != 1 {
			t.Fatalf("handed over %v", calls)
		}
		if ids := acks(); ids != nil {
			t.Errorf("acknowledged %v before OnMessages returned", ids)
		}
		goOn <- struct{}{}
		synctest.Wait()
		if len(calls) != 2 || len(calls[1]) != 4 { // with that of QoS 0
			t.Fatalf("handed over %v", calls)
		}
		if ids := acks(); !slices.Equal(ids, []uint16{1}) {
			t.Errorf("acknowledged %v after the first", ids)
		}
		goOn <- struct{}{}
		if ids := acks(); !slices.Equal(ids, []uint16{2, 3, 4}) {
			t.Errorf("acknowledged %v after the second", ids)
		}
		// The connection ends in the middle of one.
		say(5, 5, 1)
		say(6, 6, 1)
		stop()
		synctest.Wait()
		close(goOn)
		if err := <-end; err == nil {
			t.Error("no error")
		}
	})
}

// Hold comes before each attempt, and ends with Run.
func TestHold(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		held := 0
		var log []string
		cl := faked(t, Config{
			MinBackoff: time.Second, MaxBackoff: time.Second,
			Hold: func(ctx context.Context) {
				if held++; held == 3 {
					<-ctx.Done()
				}
				log = append(log, fmt.Sprint("hold ", held))
			},
			OnUp: func(context.Context) { log = append(log, "up") },
		}, func(f *fake) {
			f.connack()
			f.disconnect(0x8e, "somebody else")
		})
		ctx, cancel := context.WithCancel(t.Context())
		done := make(chan error, 1)
		go func() { done <- cl.Run(ctx) }()
		time.Sleep(time.Minute)
		cancel()
		if err := <-done; err != nil {
			t.Error(err)
		}
		if want := []string{"hold 1", "up", "hold 2", "up", "hold 3"}; !slices.Equal(log, want) {
			t.Errorf("%v", log)
		}
	})
}
