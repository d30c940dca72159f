package client

import (
	"bytes"
	"errors"
	"fmt"
	"io"
	"net"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"

	"github.com/eclipse/paho.golang/packets"
	"github.com/eclipse/paho.golang/paho"

	"github.com/fairlead-io/fairlead/schemas/topic"
)

// recorder is a connection that keeps every write apart.
type recorder struct {
	net.Conn
	mu     sync.Mutex
	writes [][]byte
	err    error
	closed chan struct{}
}

func (r *recorder) Write(p []byte) (int, error) {
	r.mu.Lock()
	defer r.mu.Unlock()
	r.writes = append(r.writes, bytes.Clone(p))
	if r.err != nil {
		return 0, r.err
	}
	return len(p), nil
}

func (r *recorder) Read([]byte) (int, error) {
	<-r.closed
	return 0, net.ErrClosed
}

// SetReadDeadline ends Read at once: nothing is left to read.
func (r *recorder) SetReadDeadline(time.Time) error { return r.Close() }

func (r *recorder) Close() error {
	close(r.closed)
	return nil
}

func publishPacket(m *Message, id uint16) *packets.ControlPacket {
	p := packets.NewControlPacket(packets.PUBLISH)
	pb := p.Content.(*packets.Publish)
	pb.Topic, pb.Payload, pb.QoS, pb.PacketID = string(m.Topic), m.Payload, m.QoS, id
	pb.Properties.ResponseTopic, pb.Properties.CorrelationData = m.ResponseTopic, m.CorrelationData
	return p
}

// Every packet leaves in one write, whoever sends at the same time.
func TestOneWritePerPacket(t *testing.T) {
	r := &recorder{closed: make(chan struct{})}
	c := newPacketConn(r, newPinger(0))
	const writers, each = 8, 50
	var wg sync.WaitGroup
	for w := range writers {
		wg.Go(func() {
			for i := range each {
				m := Message{Topic: "a/b", Payload: bytes.Repeat([]byte{byte(w)}, i*100), QoS: 1, ResponseTopic: "re"}
				if _, err := publishPacket(&m, uint16(w*each+i+1)).WriteTo(c); err != nil {
					t.Error(err)
				}
			}
		})
	}
	wg.Wait()
	if len(r.writes) != writers*each {
		t.Fatalf("%d writes for %d packets", len(r.writes), writers*each)
	}
	seen := map[uint16]bool{}
	for _, b := range r.writes {
		rest := bytes.NewReader(b)
		p, err := packets.ReadPacket(rest)
		if err != nil || rest.Len() > 0 {
			t.Fatalf("a write is not one packet: %v, %d bytes left", err, rest.Len())
		}
		pb := p.Content.(*packets.Publish)
		if i := int(pb.PacketID-1) % each; len(pb.Payload) != i*100 || bytes.Count(pb.Payload, []byte{byte(int(pb.PacketID-1) / each)}) != i*100 {
			t.Errorf("packet %d is mixed up", pb.PacketID)
		}
		seen[pb.PacketID] = true
	}
	if len(seen) != writers*each {
		t.Errorf("%d packets arrived", len(seen))
	}
	if _, err := publishPacket(&Message{Topic: "a", Payload: make([]byte, 10*maxKept)}, 1).WriteTo(c); err != nil {
		t.Error(err)
	}
	if cap(c.buf) > maxKept {
		t.Errorf("%d bytes are kept", cap(c.buf))
	}
}

// paho does not see that a write failed, so the connection ends, and says why.
func TestWriteError(t *testing.T) {
	broken := errors.New("test: broken pipe")
	r := &recorder{closed: make(chan struct{}), err: broken}
	c := newPacketConn(r, newPinger(0))
	_, _ = packets.NewControlPacket(packets.PINGREQ).WriteTo(c)
	if _, err := c.Read(make([]byte, 1)); !errors.Is(err, broken) {
		t.Errorf("Read: %v", err)
	}
	if _, err := packets.NewControlPacket(packets.PINGREQ).WriteTo(c); !errors.Is(err, broken) {
		t.Errorf("the next write: %v", err)
	}
	if len(r.writes) != 1 {
		t.Errorf("%d writes", len(r.writes))
	}
}

// What the broker said before it hung up is read although a write failed since.
func TestLastWords(t *testing.T) {
	here, there := net.Pipe()
	defer func() { _ = there.Close() }()
	c := newPacketConn(lastWords{here}, newPinger(0))
	_, _ = packets.NewControlPacket(packets.PINGREQ).WriteTo(c)
	go func() { _, _ = packets.NewControlPacket(packets.DISCONNECT).WriteTo(there) }()
	if p, err := packets.ReadPacket(c); err != nil || p.Type != packets.DISCONNECT {
		t.Errorf("read %v, %v", p, err)
	}
	if _, err := packets.ReadPacket(c); !errors.Is(err, syscall.EPIPE) {
		t.Errorf("then %v", err)
	}
}

// lastWords is a connection whose other side does not read any more.
type lastWords struct{ net.Conn }

func (lastWords) Write([]byte) (int, error) { return 0, syscall.EPIPE }

// size says how long a PUBLISH is, to the byte.
func TestSize(t *testing.T) {
	for _, n := range []int{0, 1, 100, 118, 119, 120, 121, 122, 123, 127, 128, 16370, 16380, 16390, 2097140, 2097160} {
		for qos := byte(0); qos <= 2; qos++ {
			for _, re := range []string{"", "re", strings.Repeat("r", 200)} {
				m := Message{Topic: topic.Topic("a/b"), Payload: make([]byte, n), QoS: qos, ResponseTopic: re, CorrelationData: []byte(re)}
				p := &paho.Publish{Topic: string(m.Topic), Payload: m.Payload, QoS: qos}
				if re != "" {
					p.Properties = &paho.PublishProperties{ResponseTopic: re, CorrelationData: []byte(re)}
				}
				got, err := p.Packet().WriteTo(io.Discard)
				if err != nil || uint64(got) != size(&m) {
					t.Errorf("%s: %d bytes, size says %d (%v)", fmt.Sprint(n, qos, len(re)), got, size(&m), err)
				}
			}
		}
	}
}
