package cri

import (
	"testing"

	"google.golang.org/protobuf/encoding/protowire"
)

// text appends a string field, as most of containerd's events have.
func text(b []byte, n protowire.Number, s string) []byte {
	return protowire.AppendString(protowire.AppendTag(b, n, protowire.BytesType), s)
}

// envelope is an event as containerd sends it.
func envelope(topic, kind string, body []byte) []byte {
	var b []byte
	b = text(b, 1, string(protowire.AppendVarint(protowire.AppendTag(nil, 1, protowire.VarintType), 1790000000)))
	b = text(b, 2, "k8s.io")
	b = text(b, 3, topic)
	return text(b, 4, string(text(text(nil, 1, kind), 2, string(body))))
}

// exit is the body of a TaskExit, with its numbers between and behind the texts.
func exit(container, id string) []byte {
	b := text(text(nil, 1, container), 2, id)
	b = protowire.AppendVarint(protowire.AppendTag(b, 3, protowire.VarintType), 4711)
	b = protowire.AppendVarint(protowire.AppendTag(b, 4, protowire.VarintType), 137)
	return text(b, 5, "\x08\x01")
}

func TestDecode(t *testing.T) {
	for name, tc := range map[string]struct {
		envelope []byte
		want     change
		ok       bool
	}{
		"exit":            {envelope("/tasks/exit", "containerd.events.TaskExit", exit("c1", "c1")), change{"c1", exited}, true},
		"end of a probe":  {envelope("/tasks/exit", "containerd.events.TaskExit", exit("c1", "e1")), change{}, false},
		"start":           {envelope("/tasks/start", "containerd.events.TaskStart", text(nil, 1, "c1")), change{"c1", started}, true},
		"removal":         {envelope("/containers/delete", "containerd.events.ContainerDelete", text(nil, 1, "c1")), change{"c1", gone}, true},
		"other":           {envelope("/images/create", "containerd.events.ImageCreate", text(nil, 1, "x")), change{}, false},
		"without content": {text(nil, 3, "/tasks/start"), change{}, false},
		"empty":           {nil, change{}, false},
	} {
		t.Run(name, func(t *testing.T) {
			got, ok, err := decode(tc.envelope)
			if err != nil || ok != tc.ok || ok && got != tc.want {
				t.Errorf("got %v, %t, %v; want %v, %t", got, ok, err, tc.want, tc.ok)
			}
			// Whatever is cut off, nothing panics, and nothing is made of it but what is whole.
			for n := range tc.envelope {
				if ch, ok, err := decode(tc.envelope[:n]); err == nil && ok && ch != tc.want {
					t.Errorf("of %d bytes: %v", n, ch)
				}
			}
		})
	}
	for _, bad := range [][]byte{{0xff}, {0x1a, 0xff}, {0x0f}} {
		if _, _, err := decode(bad); err == nil {
			t.Errorf("% x: want an error", bad)
		}
	}
}
