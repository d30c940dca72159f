package twin

import (
	"encoding/json"
	"reflect"
	"strconv"
	"testing"

	"github.com/fairlead-io/fairlead/schemas/payload"
)

func target(v string, rev, at int64, by string, change ...func(*payload.Target)) *payload.Target {
	g := &payload.Target{V: json.RawMessage(v), Rev: rev, UID: uid, By: by, T: at}
	if by == payload.ByLocal {
		g.Who = "local/red"
	}
	for _, c := range change {
		c(g)
	}
	return g
}

func wished(rev int64) func(*payload.Target) { return func(g *payload.Target) { g.Wish = rev } }
func until(exp int64) func(*payload.Target)  { return func(g *payload.Target) { g.Exp = exp } }

func wantTarget(t *testing.T, b *bus, prop string, want *payload.Target) {
	t.Helper()
	if got := b.target(prop); !reflect.DeepEqual(got, want) {
		t.Errorf("target of %s:\n got %s\nwant %s", prop, show(got), show(want))
	}
}

func show(g *payload.Target) string {
	if g == nil {
		return "none"
	}
	return string(payload.Encode(g))
}

// awaitTarget waits for what Run does in its own time.
func awaitTarget(t *testing.T, b *bus, prop string, want *payload.Target) {
	t.Helper()
	eventually(t, "the target of "+prop+" is "+show(want), func() bool { return reflect.DeepEqual(b.target(prop), want) })
}

// Of the cloud's wish and a local one the newer holds, and the newer is the one
// with the larger rev. All times are milliseconds after the beginning.
func TestWhoWins(t *testing.T) {
	cloud, local := payload.ByCloud, payload.ByLocal
	for _, c := range []struct {
		name string
		do   func(*bus)
		want *payload.Target
		sets float64 // targets set, of both kinds
	}{
		{"nobody wished", func(*bus) {}, nil, 0},
		{"the cloud alone", func(b *bus) {
			b.at(12)
			b.wish("speed", "40", 5)
		}, target("40", 5, 12, cloud), 1},
		{"the field alone", func(b *bus) {
			b.at(12)
			b.mustSet("speed", "35")
		}, target("35", 12, 12, local), 1},
		{"the newer wish of the cloud", func(b *bus) {
			b.wish("speed", "40", 5)
			b.at(20)
			b.wish("speed", "41", 6)
		}, target("41", 6, 20, cloud), 2},
		// The link lets a smaller rev through only where the cloud counts anew.
		{"the cloud counts anew", func(b *bus) {
			b.wish("speed", "40", 5)
			b.at(20)
			b.wish("speed", "41", 4)
		}, target("41", 6, 20, cloud, wished(4)), 2},
		{"the cloud counts anew and goes on", func(b *bus) {
			b.wish("speed", "40", 9)
			b.at(20)
			b.wish("speed", "41", 4)
			b.wish("speed", "42", 5)
		}, target("42", 11, 20, cloud, wished(5)), 3},
		{"the cloud counts anew: the field's rev is the larger", func(b *bus) {
			b.wish("speed", "40", 5)
			b.at(20)
			b.mustSet("speed", "35")
			b.wish("speed", "41", 4)
		}, target("35", 20, 20, local), 2},
		{"the same wish again is no new target", func(b *bus) {
			b.wish("speed", "40", 5)
			b.at(20)
			b.wish("speed", "40", 5)
		}, target("40", 5, 0, cloud), 1},
		{"an equal rev changes nothing, whatever it wants", func(b *bus) {
			b.wish("speed", "40", 5)
			b.at(20)
			b.wish("speed", "99", 5)
		}, target("40", 5, 0, cloud), 1},
		{"the field after the cloud", func(b *bus) {
			b.wish("speed", "40", 5)
			b.at(20)
			b.mustSet("speed", "35")
		}, target("35", 20, 20, local), 2},
		{"the cloud after the field", func(b *bus) {
			b.at(5)
			b.mustSet("speed", "35")
			b.at(20)
			b.wish("speed", "40", 19)
		}, target("40", 19, 20, cloud), 2},
		{"the cloud's clock is ahead: the field still wins after it", func(b *bus) {
			b.wish("speed", "40", 9_000_000)
			b.at(20)
			b.mustSet("speed", "35")
		}, target("35", 9_000_001, 20, local), 2},
		{"the cloud's clock is ahead: its wish wins over an older one of the field", func(b *bus) {
			b.at(20)
			b.mustSet("speed", "35")
			b.wish("speed", "40", 9_000_000)
		}, target("40", 9_000_000, 20, cloud), 2},
		{"the node's clock is ahead: the field's rev is the larger", func(b *bus) {
			b.at(9_000_000)
			b.mustSet("speed", "35")
			b.wish("speed", "40", 25)
		}, target("35", 9_000_000, 9_000_000, local), 1},
		{"the node's clock goes back: its revs do not", func(b *bus) {
			b.at(9_000_000)
			b.mustSet("speed", "35")
			b.at(20)
			b.mustSet("speed", "36")
		}, target("36", 9_000_001, 20, local), 2},
		{"equal revs of cloud and field: what was first stays", func(b *bus) {
			b.at(20)
			b.mustSet("speed", "35")
			b.wish("speed", "40", 20)
		}, target("35", 20, 20, local), 1},
		{"two wishes of the field in one millisecond", func(b *bus) {
			b.mustSet("speed", "35")
			b.mustSet("speed", "36")
		}, target("36", 1, 0, local), 2},
		{"a wish of the cloud that the field overruled is known to the next rev", func(b *bus) {
			b.at(20)
			b.mustSet("speed", "35")
			b.wish("speed", "40", 20) // not newer
			b.mustSet("speed", "36")
		}, target("36", 21, 20, local), 2},
		{"the cloud takes its wish back", func(b *bus) {
			b.wish("speed", "40", 5)
			b.cloud(wishTopic("speed"), nil)
		}, nil, 1},
		{"the cloud takes back a wish that the field overruled", func(b *bus) {
			b.wish("speed", "40", 5)
			b.at(20)
			b.mustSet("speed", "35")
			b.cloud(wishTopic("speed"), nil)
		}, target("35", 20, 20, local), 2},
		{"the cloud takes its wish back and wishes the old value again", func(b *bus) {
			b.wish("speed", "40", 5)
			b.cloud(wishTopic("speed"), nil)
			b.at(20)
			b.wish("speed", "40", 6)
		}, target("40", 6, 20, cloud), 2},
		{"a stale wish of the cloud is ignored", func(b *bus) {
			b.at(100)
			b.wish("speed", "40", 5, 100)
		}, nil, 0},
		{"a stale wish of the cloud does not touch the field's", func(b *bus) {
			b.at(20)
			b.mustSet("speed", "35")
			b.at(100)
			b.wish("speed", "40", 50, 60)
		}, target("35", 20, 20, local), 1},
		{"a stale wish of the cloud takes the one before with it", func(b *bus) {
			b.wish("speed", "40", 5)
			b.at(100)
			b.wish("speed", "41", 50, 60)
		}, nil, 1},
		{"a wish with an end", func(b *bus) {
			b.at(10)
			b.wish("speed", "40", 5, 60)
		}, target("40", 5, 10, cloud, until(60)), 1},
		{"a local wish with an end", func(b *bus) {
			b.at(10)
			b.mustSet("speed", `{"v":35,"exp":`+ms(60)+`}`)
		}, target("35", 10, 10, local, until(60)), 1},
		{"a wish for another uid is ignored", func(b *bus) {
			b.cloud(wishTopic("speed"), payload.Wish{V: json.RawMessage("40"), Rev: began, UID: uid2})
		}, nil, 0},
		{"a wish that cannot be read is ignored", func(b *bus) {
			b.wish("speed", "40", 5)
			b.cloud(wishTopic("speed"), `{"v":`)
			b.cloud(wishTopic("speed"), `null`)
			b.cloud(wishTopic("speed"), `{"rev":1790000000099,"uid":"`+uid+`"}`)
		}, target("40", 5, 0, cloud), 1},
		{"wishes beyond 2^53 keep every digit", func(b *bus) {
			b.wish("speed", `"18446744073709551615"`, 5)
		}, target(`"18446744073709551615"`, 5, 0, cloud), 1},
	} {
		t.Run(c.name, func(t *testing.T) {
			b := start(t, t.TempDir(), began)
			b.cloud(deviceTopic, pump())
			c.do(b)
			wantTarget(t, b, "speed", c.want)
			if got := b.count("fairlead_twin_targets_total", cloud) + b.count("fairlead_twin_targets_total", local); got != c.sets {
				t.Errorf("want %g targets counted, got %g", c.sets, got)
			}
			// All of it is in the topics: a restart changes nothing.
			now := b.clock.Load()
			dir := b.dir
			b.stop()
			again := start(t, dir, now)
			wantTarget(t, again, "speed", c.want)
			if got := again.count("fairlead_twin_targets_total", cloud); got != 0 {
				t.Errorf("the restart set %g targets", got)
			}
		})
	}
}

func ms(after int64) string { return strconv.FormatInt(began+after, 10) }

// A wish that the model does not let through from the field is the mapper's to
// refuse when it comes from the cloud; but what cannot be written gets no target.
func TestWishForWhatCannotBeWritten(t *testing.T) {
	b := start(t, t.TempDir(), began)
	b.cloud(deviceTopic, pump())
	b.wish("pressure", "4", 5)
	b.wish("nothing", "4", 5)
	wantTarget(t, b, "pressure", nil)
	wantTarget(t, b, "nothing", nil)
}

// The end of a target comes in its own time, without anybody's message.
func TestExpiry(t *testing.T) {
	cloud, local := payload.ByCloud, payload.ByLocal
	for _, c := range []struct {
		name         string
		do           func(*bus)
		before, then *payload.Target
	}{
		{"a local wish, and nothing else", func(b *bus) {
			b.mustSet("speed", `{"v":35,"exp":`+ms(60)+`}`)
		}, target("35", 0, 0, local, until(60)), nil},
		{"a cloud wish", func(b *bus) {
			b.wish("speed", "40", 5, 60)
		}, target("40", 5, 0, cloud, until(60)), nil},
		{"a local wish falls back to the cloud's", func(b *bus) {
			b.wish("speed", "40", -5)
			b.mustSet("speed", `{"v":35,"exp":`+ms(60)+`}`)
		}, target("35", 0, 0, local, until(60)), target("40", 60, 60, cloud, wished(-5))},
		{"a local wish falls back to the cloud's, which ends as well", func(b *bus) {
			b.wish("speed", "40", -5, 1000)
			b.mustSet("speed", `{"v":35,"exp":`+ms(60)+`}`)
		}, target("35", 0, 0, local, until(60)), target("40", 60, 60, cloud, wished(-5), until(1000))},
		{"the cloud's wish has ended meanwhile", func(b *bus) {
			b.wish("speed", "40", -5, 50)
			b.mustSet("speed", `{"v":35,"exp":`+ms(60)+`}`)
		}, target("35", 0, 0, local, until(60)), nil},
		{"the cloud's clock is ahead: the fallback still has a newer rev", func(b *bus) {
			b.wish("speed", "40", 9000)
			b.mustSet("speed", `{"v":35,"exp":`+ms(60)+`}`)
		}, target("35", 9001, 0, local, until(60)), target("40", 9002, 60, cloud, wished(9000))},
		{"the cloud made its wish last longer without a new rev", func(b *bus) {
			b.wish("speed", "40", 5, 60)
			b.wish("speed", "40", 5, 600)
		}, target("40", 5, 0, cloud, until(60)), target("40", 60, 60, cloud, wished(5), until(600))},
		{"the wish for another uid is no fallback", func(b *bus) {
			b.cloud(wishTopic("speed"), payload.Wish{V: json.RawMessage("40"), Rev: began - 5, UID: uid2})
			b.mustSet("speed", `{"v":35,"exp":`+ms(60)+`}`)
		}, target("35", 0, 0, local, until(60)), nil},
	} {
		check := func(t *testing.T, restart bool) {
			b := start(t, t.TempDir(), began)
			b.cloud(deviceTopic, pump())
			// Ends a moment later, so that there is something to wait for.
			b.mustSet("mode", `{"v":1,"exp":`+ms(61)+`}`)
			c.do(b)
			b.at(59)
			wantTarget(t, b, "speed", c.before)
			if !restart {
				b.at(60)
				awaitTarget(t, b, "speed", c.then)
				if b.target("mode") == nil {
					t.Error("a target ended before its time")
				}
				b.at(61)
				awaitTarget(t, b, "mode", nil)
				wantTarget(t, b, "speed", c.then)
				return
			}
			// The node was off when the time came; whoever comes to the bus first
			// does not see the old target any more.
			dir := b.dir
			b.stop()
			b = open(t, dir, began+60)
			if err := b.engine.Start(t.Context(), b); err != nil {
				t.Fatal(err)
			}
			wantTarget(t, b, "speed", c.then)
			if b.target("mode") == nil {
				t.Error("a target ended before its time")
			}
			b.run()
			b.at(61)
			awaitTarget(t, b, "mode", nil)
		}
		t.Run(c.name, func(t *testing.T) { check(t, false) })
		t.Run(c.name+", off meanwhile", func(t *testing.T) { check(t, true) })
	}
}

// A target that was renewed does not end with the one before.
func TestExpiryOfARenewedTarget(t *testing.T) {
	b := start(t, t.TempDir(), began)
	b.cloud(deviceTopic, pump())
	b.mustSet("speed", `{"v":35,"exp":`+ms(60)+`}`)
	b.mustSet("mode", `{"v":1,"exp":`+ms(60)+`}`)
	b.mustSet("speed", `{"v":36,"exp":`+ms(600)+`}`)
	b.mustSet("label", `{"v":"a","exp":`+ms(60)+`}`)
	b.mustSet("label", `"b"`) // for ever
	b.at(60)
	awaitTarget(t, b, "mode", nil)
	wantTarget(t, b, "speed", target("36", 1, 0, payload.ByLocal, until(600)))
	wantTarget(t, b, "label", target(`"b"`, 1, 0, payload.ByLocal))
	b.at(600)
	awaitTarget(t, b, "speed", nil)
	wantTarget(t, b, "label", target(`"b"`, 1, 0, payload.ByLocal))
}

func TestIf(t *testing.T) {
	b := start(t, t.TempDir(), began)
	b.cloud(deviceTopic, pump())
	const conflict = 0x83
	wantRefused(t, b.set("speed", `{"v":1,"if":`+ms(5)+`}`), conflict, "conflict", "rev")
	b.wish("speed", "40", 5)
	wantRefused(t, b.set("speed", `{"v":1,"if":`+ms(4)+`}`), conflict, "conflict", ms(5), ms(4), "in between")
	wantTarget(t, b, "speed", target("40", 5, 0, payload.ByCloud))
	b.at(20)
	b.mustSet("speed", `{"v":1,"if":`+ms(5)+`}`)
	wantTarget(t, b, "speed", target("1", 20, 20, payload.ByLocal))
	wantRefused(t, b.set("speed", `{"v":2,"if":`+ms(5)+`}`), conflict, "conflict")
	if got := b.count("fairlead_twin_wishes_refused_total", "conflict"); got != 3 {
		t.Errorf("want 3 conflicts counted, got %g", got)
	}
}
