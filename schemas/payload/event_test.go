package payload_test

import (
	"strings"
	"testing"

	"github.com/fairlead-io/fairlead/schemas/payload"
)

func TestEventID(t *testing.T) {
	for _, id := range []payload.EventID{
		{Epoch: "9f86d081884c7d65", Seq: 1, Time: at},
		{Epoch: "a", Seq: 1<<64 - 1, Time: 0, First: true},
	} {
		user := append([][2]string{{"unit", "bar"}}, id.UserProperties()...)
		if got, ok, err := payload.ReadEventID(user); got != id || !ok || err != nil {
			t.Errorf("%v was read back as %v, %v, %v", user, got, ok, err)
		}
	}
	for _, x := range []struct {
		name string
		user [][2]string
		err  string // empty for a message that is simply no event of a log
	}{
		{"nothing", nil, ""},
		{"others'", [][2]string{{"seq", "1"}, {"epoch", "a"}}, ""},
		{"no seq", [][2]string{{payload.EventEpoch, "a"}}, payload.EventSeq},
		{"no epoch", [][2]string{{payload.EventSeq, "1"}}, payload.EventEpoch},
		{"seq 0", [][2]string{{payload.EventEpoch, "a"}, {payload.EventSeq, "0"}}, payload.EventSeq},
		{"negative seq", [][2]string{{payload.EventEpoch, "a"}, {payload.EventSeq, "-1"}}, payload.EventSeq},
		{"long epoch", [][2]string{{payload.EventEpoch, strings.Repeat("a", 33)}, {payload.EventSeq, "1"}}, payload.EventEpoch},
		{"no time", [][2]string{{payload.EventEpoch, "a"}, {payload.EventSeq, "1"}, {payload.EventTime, "now"}}, payload.EventTime},
	} {
		_, ok, err := payload.ReadEventID(x.user)
		if ok || (err == nil) != (x.err == "") || err != nil && !strings.Contains(err.Error(), x.err) {
			t.Errorf("%s: got %v, %v", x.name, ok, err)
		}
	}
}
