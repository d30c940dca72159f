package modbussim

import (
	"context"
	"encoding/binary"
	"errors"
	"fmt"
	"io"
	"net"
	"sync"
	"sync/atomic"
	"time"
)

const (
	tick       = 100 * time.Millisecond
	headerSize = 7
	maxConns   = 64
	idleLimit  = 10 * time.Minute
)

// Exception codes (MODBUS Application Protocol V1.1b3, section 7).
const (
	illegalFunction = 1
	illegalAddress  = 2
	illegalValue    = 3
)

// Server serves a plant.
type Server struct {
	plant    *Plant
	listener net.Listener
	stalled  atomic.Bool

	mu struct {
		sync.Mutex
		conns map[net.Conn]struct{}
	}
}

// Listen opens the address; port 0 takes a free one.
func Listen(addr string, p *Plant) (*Server, error) {
	l, err := net.Listen("tcp", addr)
	if err != nil {
		return nil, err
	}
	s := &Server{plant: p, listener: l}
	s.mu.conns = map[net.Conn]struct{}{}
	return s, nil
}

// Addr is where the server listens.
func (s *Server) Addr() net.Addr { return s.listener.Addr() }

// ToggleStall makes the server swallow requests without an answer, or answer
// again; it tells which.
func (s *Server) ToggleStall() (stalled bool) {
	stalled = !s.stalled.Load()
	s.stalled.Store(stalled)
	return stalled
}

// Serve answers and moves the plant until ctx ends. It is called once.
func (s *Server) Serve(ctx context.Context) error {
	var wg sync.WaitGroup
	defer wg.Wait()
	stop := context.AfterFunc(ctx, func() {
		_ = s.listener.Close()
		s.mu.Lock()
		defer s.mu.Unlock()
		for c := range s.mu.conns {
			_ = c.Close()
		}
	})
	defer stop()
	wg.Go(func() { s.move(ctx) })
	for {
		c, err := s.listener.Accept()
		if err != nil {
			if ctx.Err() != nil {
				return nil
			}
			return fmt.Errorf("accept: %w", err)
		}
		s.mu.Lock()
		if len(s.mu.conns) >= maxConns || ctx.Err() != nil {
			s.mu.Unlock()
			_ = c.Close()
			continue
		}
		s.mu.conns[c] = struct{}{}
		s.mu.Unlock()
		wg.Go(func() {
			defer func() {
				s.mu.Lock()
				defer s.mu.Unlock()
				delete(s.mu.conns, c)
				_ = c.Close()
			}()
			s.converse(c)
		})
	}
}

func (s *Server) move(ctx context.Context) {
	t := time.NewTicker(tick)
	defer t.Stop()
	for {
		select {
		case <-ctx.Done():
			return
		case <-t.C:
			s.plant.Step(tick)
		}
	}
}

// converse answers one connection until it ends or breaks the protocol.
func (s *Server) converse(c net.Conn) {
	var head [headerSize]byte
	for {
		if c.SetDeadline(time.Now().Add(idleLimit)) != nil {
			return
		}
		if _, err := io.ReadFull(c, head[:]); err != nil {
			return
		}
		n := int(binary.BigEndian.Uint16(head[4:])) - 1
		if binary.BigEndian.Uint16(head[2:]) != 0 || n < 1 || n > 253 {
			return
		}
		pdu := make([]byte, n)
		if _, err := io.ReadFull(c, pdu); err != nil {
			return
		}
		if s.stalled.Load() {
			continue
		}
		reply := s.plant.answer(pdu)
		frame := append(head[:4:4], 0, 0, head[6])
		binary.BigEndian.PutUint16(frame[4:], uint16(1+len(reply)))
		if _, err := c.Write(append(frame, reply...)); err != nil {
			return
		}
	}
}

// refusal is an exception code on its way to the client.
type refusal byte

func (r refusal) Error() string { return fmt.Sprintf("modbus exception %d", byte(r)) }

// answer carries a request PDU out and gives the reply PDU.
func (p *Plant) answer(pdu []byte) []byte {
	reply, err := p.execute(pdu[0], pdu[1:])
	if err != nil {
		code := byte(illegalValue)
		var r refusal
		if errors.As(err, &r) {
			code = byte(r)
		}
		return []byte{pdu[0] | 0x80, code}
	}
	return append([]byte{pdu[0]}, reply...)
}

var errShort = errors.New("request too short")

func (p *Plant) execute(function byte, b []byte) ([]byte, error) {
	if function < 1 || function > 6 && function != 15 && function != 16 {
		return nil, refusal(illegalFunction)
	}
	if len(b) < 4 {
		return nil, errShort
	}
	addr, count := int(binary.BigEndian.Uint16(b)), int(binary.BigEndian.Uint16(b[2:]))
	switch function {
	case 1:
		return readBits(p.coils(), addr, count)
	case 2:
		return readBits(p.discreteInputs(), addr, count)
	case 3:
		return readRegisters(p.holdingRegisters(), addr, count)
	case 4:
		return readRegisters(p.inputRegisters(), addr, count)
	case 5:
		if count != 0 && count != 0xFF00 {
			return nil, refusal(illegalValue)
		}
		if !p.setCoil(addr, count != 0) {
			return nil, refusal(illegalAddress)
		}
	case 6:
		if e := p.setRegister(addr, uint16(count)); e != 0 {
			return nil, refusal(e)
		}
	case 15:
		if count < 1 || count > 1968 || len(b) != 5+(count+7)/8 {
			return nil, refusal(illegalValue)
		}
		if addr+count > Coils {
			return nil, refusal(illegalAddress)
		}
		for i := range count {
			p.setCoil(addr+i, b[5+i/8]>>(i%8)&1 == 1)
		}
	case 16:
		if count < 1 || count > 123 || len(b) != 5+2*count {
			return nil, refusal(illegalValue)
		}
		if addr+count > 1 { // only the setpoint is writable
			return nil, refusal(illegalAddress)
		}
		if e := p.setRegister(addr, binary.BigEndian.Uint16(b[5:])); e != 0 {
			return nil, refusal(e)
		}
	}
	return b[:4], nil // the echo that all writes answer with
}

func readBits(table []bool, addr, count int) ([]byte, error) {
	if count < 1 || count > 2000 {
		return nil, refusal(illegalValue)
	}
	if addr+count > len(table) {
		return nil, refusal(illegalAddress)
	}
	out := make([]byte, 1+(count+7)/8)
	out[0] = byte(len(out) - 1)
	for i := range count {
		if table[addr+i] {
			out[1+i/8] |= 1 << (i % 8)
		}
	}
	return out, nil
}

func readRegisters(table []byte, addr, count int) ([]byte, error) {
	if count < 1 || count > 125 {
		return nil, refusal(illegalValue)
	}
	if 2*(addr+count) > len(table) {
		return nil, refusal(illegalAddress)
	}
	return append([]byte{byte(2 * count)}, table[2*addr:2*(addr+count)]...), nil
}
